"""How the demo model is made: data, tokenizer, training, export, evaluation."""
