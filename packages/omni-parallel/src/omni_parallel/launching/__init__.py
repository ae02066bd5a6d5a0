"""Starting ranks with torch's elastic agent, and ending every one of them."""
