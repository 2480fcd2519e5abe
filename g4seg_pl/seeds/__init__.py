"""Makers of coarse masks: each a LightningModule around pure functions of tensors."""
