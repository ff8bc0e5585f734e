"""From a folder of identities to tensors: index, epoch plan, pipelines, loader, and the embedded data set."""
