"""What a run folder holds: names of files, readers, scores, exports. It reads what the stages wrote and loads no model."""
