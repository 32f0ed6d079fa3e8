"""The datasets by name. Each is one file in this folder; `protocol.py` defines what such a file contains. No scores, no results."""

from mpa.data import chartqa, easyvqa, images, okvqa, stvqa, textvqa

DATASETS = {module.DATASET.name: module.DATASET for module in (textvqa, stvqa, chartqa, okvqa, easyvqa, images)}
