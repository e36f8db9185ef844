"""The tasks that models are trained for; see shoal.models.task for what a task is."""
