// What this processor has. Built for any x86-64: the other files may use no instruction before this has said yes.

extern "C" const char* rg_digest() { return RILLGATE_DIGEST; }

extern "C" int rg_is_supported() { return RILLGATE_IS_SUPPORTED; }
