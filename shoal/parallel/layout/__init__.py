"""Named-dimension layouts (Shazeer et al., 2018): rules say which mesh axis splits which named dimension."""
