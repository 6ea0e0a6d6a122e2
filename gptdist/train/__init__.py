"""The loop of training and what it needs: schedules, guards, evaluation."""
