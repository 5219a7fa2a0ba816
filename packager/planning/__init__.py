"""The plan: recipe, target and options, sizes and speed, and the reasons for a refusal."""
