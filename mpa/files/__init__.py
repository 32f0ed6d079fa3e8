"""Safe files and processes: records and their meta files, journals, locks, logs, images, distributed processes. Nothing here knows a
model, a dataset or the method."""
