"""`--config=W/config.json`: a run's own config, in the form that the config flag loads."""

from jaxlm.build import saved_config


def get_config(path: str):
    return saved_config(path)
