"""Floor 4: run directories side by side. Reads plain files only: no torch, no account."""
