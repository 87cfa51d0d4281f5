"""Tasks: one LightningModule and one LightningDataModule each."""
