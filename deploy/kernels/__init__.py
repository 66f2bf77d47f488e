"""The kernels: one class a family, and a row here for each (docs/add_a_kernel.md)."""

from .family import Family
from .nchw_elementwise import NCHWAffine, NCHWConcat, NCHWMean, NCHWSlicePad
from .nchw_pixel_conv import NCHWPixelConv
from .nchw_row_conv import NCHWRowConv
from .nchw_small_depthwise import NCHWSmallDepthwise
from .nchw_window import NCHWWindow
from .nchwc_conv import NCHWcConv
from .nchwc_elementwise import NCHWcAffine, NCHWcMean
from .nchwc_window import NCHWcWindow

# Among those that fit a node in a layout, the one that promises the fewest cycles is taken; of equals, the first.
FAMILIES: list[type[Family]] = [
    NCHWPixelConv,
    NCHWRowConv,
    NCHWcConv,
    NCHWSmallDepthwise,
    NCHWWindow,
    NCHWcWindow,
    NCHWMean,
    NCHWcMean,
    NCHWAffine,
    NCHWcAffine,
    NCHWSlicePad,
    NCHWConcat,
]
