"""Examples to copy: one file each, and nothing imported from beside it."""
