"""The stages: SFT, the reward model and PPO, and the pipeline that runs them one after the other."""
