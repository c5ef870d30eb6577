"""Long videos: concepts, scores and early exit, on arrays of a whole split."""
