"""Small files as telescopes and planetary missions write them: FITS, PDS3 and PDS4."""

PDS3 = """PDS_VERSION_ID = PDS3\r
RECORD_TYPE = FIXED_LENGTH\r
RECORD_BYTES = 100\r
LABEL_RECORDS = 10\r
^IMAGE = 11\r
OBJECT = IMAGE\r
  LINES = {}\r
  LINE_SAMPLES = {}\r
  SAMPLE_TYPE = MSB_INTEGER\r
  SAMPLE_BITS = 16\r
END_OBJECT = IMAGE\r
END\r
"""
PDS4 = """<?xml version="1.0" encoding="UTF-8"?>
<Product_Observational xmlns="http://pds.nasa.gov/pds4/pds/v1">
 <Identification_Area><logical_identifier>urn:nasa:pds:a:b:c</logical_identifier><version_id>1.0</version_id>
  <title>c</title><information_model_version>1.11.0.0</information_model_version>
  <product_class>Product_Observational</product_class></Identification_Area>
 <File_Area_Observational>
  <File><file_name>pds4.dat</file_name></File>
  <Array_2D_Image>
   <local_identifier>image</local_identifier>
   <offset unit="byte">0</offset><axes>2</axes><axis_index_order>Last Index Fastest</axis_index_order>
   <Element_Array><data_type>SignedMSB2</data_type></Element_Array>
   <Axis_Array><axis_name>Line</axis_name><elements>{}</elements><sequence_number>1</sequence_number></Axis_Array>
   <Axis_Array><axis_name>Sample</axis_name><elements>{}</elements><sequence_number>2</sequence_number></Axis_Array>
  </Array_2D_Image>
 </File_Area_Observational>
</Product_Observational>
"""


def fits_file(path, values):
    """Write a FITS of int16 values, ``(H, W)`` or ``(C, H, W)``."""
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": values.ndim}
    cards |= {f"NAXIS{i}": size for i, size in enumerate(values.shape[::-1], 1)}
    header = "".join(f"{key:<8}= {value:>20}".ljust(80) for key, value in cards.items()) + "END".ljust(80)
    data = values.astype(">i2").tobytes()
    path.write_bytes(header.ljust(-(-len(header) // 2880) * 2880).encode() + data + bytes(-len(data) % 2880))


def pds_files(folder, values):
    """Write a PDS3 and a PDS4 product of int16 values, ``(H, W)``, into a folder."""
    data = values.astype(">i2").tobytes()
    (folder / "pds3.img").write_bytes(PDS3.format(*values.shape).encode().ljust(1000) + data)
    (folder / "pds4.xml").write_text(PDS4.format(*values.shape))
    (folder / "pds4.dat").write_bytes(data)
