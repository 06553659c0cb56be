"""The shipped rewards, one file each; `cards.yaml` says what a score means. Known by name: `make_reward("clip")`."""

if not __name__.startswith("diffalign."):
    raise ImportError(f"'{__name__}' would be a second copy of diffalign.rewards. Write: import diffalign.rewards")
