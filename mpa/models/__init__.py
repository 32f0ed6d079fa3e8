"""What a checkpoint is: the table of families, loading and its checks, conversion, memory, quantization. Stages and trainer share it;
it knows no prompt and no dataset."""
