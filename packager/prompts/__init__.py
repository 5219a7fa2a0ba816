"""What a model is asked, and how its chat template renders it."""
