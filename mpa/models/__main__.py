"""python -m mpa.models PATH…: check model folders before a long run; --families: print the table of families."""

import sys
from importlib.metadata import version

from mpa.files.records import InputError
from mpa.models import families
from mpa.models.loading import check_model_path

if __name__ == "__main__":
    if sys.argv[1:] == ["--families"]:
        print(*families.table(version("transformers")), sep="\n")
        sys.exit()
    try:
        for model_path in sys.argv[1:]:
            check_model_path(model_path)
    except InputError as failure:
        sys.exit(f"error: {failure}")
