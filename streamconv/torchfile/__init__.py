"""Reading what torch.save wrote, without torch: the zip, the pickle, and what a rank file means."""
