"""Networks: timm backbones, heads, and the exported folders that plain timm loads."""
