"""Model files made of random weights: any shape, any quant, in seconds."""
