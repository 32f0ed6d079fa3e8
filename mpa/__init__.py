"""Label-free Model Parity Alignment (arXiv 2509.16633): what the four stages share."""
