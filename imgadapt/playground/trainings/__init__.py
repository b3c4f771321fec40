"""Trainings: data sets, and runs in processes of their own."""
