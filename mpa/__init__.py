"""Label-free Model Parity Alignment (arXiv 2509.16633): the code that the four stages share."""
