"""What tests share: oracles, problems, models, programs that run in processes of their own, and plugins of pytest."""
