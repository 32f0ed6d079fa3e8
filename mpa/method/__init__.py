"""What the paper says: presets, task prompts, the parity rule, the held-out set, anchors. No model is asked here, and no file of a
stage is written."""
