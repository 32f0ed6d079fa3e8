"""The datasets by name. Each is one file here; `protocol.py` says what such a file holds."""

from mpa.datasets import chartqa, easyvqa, images, okvqa, stvqa, textvqa

DATASETS = {module.DATASET.name: module.DATASET for module in (textvqa, stvqa, chartqa, okvqa, easyvqa, images)}
