"""What the paper says: presets, task prompts, the verdict on a sample, the held-out set; and in `rules` what goes beyond it. No model
is asked here, and no file of a stage is written."""
