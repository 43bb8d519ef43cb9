"""The commands osyncd and osync."""
