"""The cluster as this daemon sees it: its links and what they say."""
