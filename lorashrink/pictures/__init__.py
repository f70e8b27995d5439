"""Drawing with diffusers pipelines, and how alike two pictures are."""
