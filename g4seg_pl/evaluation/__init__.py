"""Everything reported about masks: data-set mIoU, boundaries, uncertainty, soft maps."""
