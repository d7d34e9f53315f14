"""What ``lightning-sop`` does besides running a Trainer."""
