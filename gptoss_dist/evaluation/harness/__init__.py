"""Tasks of the EleutherAI harness (lm-eval) on a model of this project, through the harness's Python interface."""
