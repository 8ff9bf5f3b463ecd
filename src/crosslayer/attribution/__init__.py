"""Attribution graphs: why the model said what it said, through features, from words and image patches to the output."""
