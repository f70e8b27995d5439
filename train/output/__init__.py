"""What a run leaves behind: adapters, states, samples, logs and metadata."""
