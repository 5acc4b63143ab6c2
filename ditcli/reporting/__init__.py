"""What a run tells its user: lists, curves, pictures and one page. Nothing here imports torch."""
