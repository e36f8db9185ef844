// All of the shared-memory transport in one compilation, for a library that compiles another folder.
#pragma once

