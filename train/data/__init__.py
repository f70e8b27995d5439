"""Pictures and captions: found, sorted into buckets, cached, and put into batches."""
