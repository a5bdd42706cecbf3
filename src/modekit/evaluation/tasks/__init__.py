"""What models can do, besides predicting text: lm-evaluation-harness on base, experts and mixture; questions from the text."""
