# -DISTHMUS_SANITIZE=ON builds the C++ tests and the extension with AddressSanitizer and UBSan (`make sanitize`).
option(ISTHMUS_SANITIZE "Build with AddressSanitizer and UndefinedBehaviorSanitizer" OFF)
if(ISTHMUS_SANITIZE)
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=address,undefined)
endif()
