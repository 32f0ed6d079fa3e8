"""What `scripts/reproduce.sh` runs: experiment files, the jobs of each, and the code that reads them."""
