"""What is measured and shown: tracking, memory, FLOPs, scores, reports."""
