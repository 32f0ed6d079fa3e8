"""Run the jobs of an experiment file with Snakemake, then list what failed. `scripts/reproduce.sh` prepares and calls this.

    python scripts/reproduce.py RESULTS FLAGS OF SNAKEMAKE…

Reads  experiments/Snakefile, and the experiment file that `--config experiment=FILE` names.
Writes RESULTS/<preset>-<seed>/, with the stages' files; logs/, what each job printed; failed/, the commands of failed jobs;
       snakemake.log, what Snakemake printed.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa import experiments
from mpa.records import REPOSITORY as ROOT

ALWAYS = [
    *("--snakefile", str(ROOT / "experiments/Snakefile")),
    *("--nolock", "--keep-going"),  # reproduce.sh holds a lock that a kill releases
    # Results are written whole, by renaming: none is deleted, and the stage of a killed job says whether it is finished.
    *("--rerun-incomplete", "--keep-incomplete"),
    *("--rerun-triggers", "mtime", "params", "input"),
]
# Flags with which Snakemake only prints.
SHOWN = set("-n --dry-run --dryrun -h --help --dag --rulegraph --summary".split())


def snakemake(results: Path, flags: list[str]) -> int:
    """Run Snakemake in this process, which so gets the signals; its own lines go to snakemake.log. Returns its exit status."""
    from snakemake.cli import main

    if not SHOWN & set(flags):
        log = os.open(results / "snakemake.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, sys.stderr.fileno())
    try:
        main([*ALWAYS, "--directory", str(results), *flags])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def report_failures(results: Path) -> int:
    """Print each failed job with the command that repeats it. Returns their number."""
    failed = sorted(path for path in (results / "failed").rglob("*") if path.is_file())
    if failed:
        print(
            f"\n{len(failed)} jobs failed, and what depends on them was not run. The same command tries again; each alone:"
        )
    for path in failed:
        name = path.relative_to(results / "failed")
        print(f"  {name}, log {results / 'logs' / name}.log\n    {path.read_text().strip()}")
    return len(failed)


def main(argv: list[str]) -> int:
    results, flags = Path(argv[0]), argv[1:]
    file = next(flag.removeprefix("experiment=") for flag in flags if flag.startswith("experiment="))
    if data := experiments.read(file).data:
        os.environ["MPA_DATA"] = str(data)
    screen = os.dup(sys.stderr.fileno())
    code = snakemake(results, flags)
    os.dup2(screen, sys.stderr.fileno())
    failed = report_failures(results)
    if code and not failed:
        log = results / "snakemake.log"
        said = log.read_text().strip().splitlines()[-12:] if log.exists() else []
        print("\n".join([f"error: stopped, by a signal or by Snakemake. The end of {log}:", *said]), file=sys.stderr)

    # --- the tables of what there is, what looks wrong in it, and how it looks ---
    if not SHOWN & set(flags):
        scripts = ["tables.py", "diagnose.py --short", *(["report.py"] if os.environ.get("REPORT") != "0" else [])]
        for script in scripts:
            print(flush=True)
            name, *more = script.split()
            subprocess.run(
                [sys.executable, str(ROOT / "scripts" / name), str(results), *more], stderr=subprocess.STDOUT
            )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
