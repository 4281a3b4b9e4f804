"""The stages: SFT, the reward model and PPO, the table of them, and the pipeline that runs them one after the other."""
