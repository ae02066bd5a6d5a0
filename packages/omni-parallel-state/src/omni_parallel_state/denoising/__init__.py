"""What strategies share that change how a pipeline calls its denoiser."""
