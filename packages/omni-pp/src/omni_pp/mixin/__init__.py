"""What `PipelineParallelMixin` is made of: messages of a step, branches, wrapped methods."""
