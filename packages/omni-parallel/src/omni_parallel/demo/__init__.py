"""The demonstration: pictures from prompts on one process and on several ranks, compared."""
