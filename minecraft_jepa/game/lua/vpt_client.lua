-- Client mod: shows the number of each frame above the picture, and logs the state of that frame.
-- game/luanti.py writes BITS (bits of the number) and ROWS (height of the blocks, as a fraction of
-- the screen) above this file.

local KEYS = {"up", "left", "down", "right", "jump", "sneak", "aux1", "dig", "place"}

local blocks = {}  -- HUD ids
local frame = 0

local function texture(is_white)
  return "blank.png^[noalpha^[colorize:#" .. (is_white and "ffffff" or "000000") .. ":255"
end

-- Two blocks to compare with, white and black, then the bits of the number in Gray code.
-- The number wraps around: from the last to the first one bit changes, as everywhere.
local function show_number(player)
  local number = frame % 2^BITS
  for bit = -2, BITS - 1 do
    local is_white = bit == -2
    if bit >= 0 then
      is_white = math.floor((number + 2^bit) / 2^(bit + 1)) % 2 == 1
    end
    if blocks[bit] then
      player:hud_change(blocks[bit], "text", texture(is_white))
    else
      blocks[bit] = player:hud_add({
        type = "image",
        hud_elem_type = "image",
        position = {x = (bit + 2) / (BITS + 2), y = 0},
        alignment = {x = 1, y = 1},
        offset = {x = 0, y = 0},
        scale = {x = -100 / (BITS + 2), y = -100 * ROWS},
        text = texture(is_white),
        z_index = 1000,
      })
    end
  end
end

local function pressed_keys(player)
  local control, bits = player:get_control(), 0
  for i, key in ipairs(KEYS) do
    if control[key] then
      bits = bits + 2^(i - 1)
    end
  end
  return bits
end

minetest.register_globalstep(function()
  local player, camera = minetest.localplayer, minetest.camera
  if not (player and camera) then
    return
  end
  frame = frame + 1
  show_number(player)
  local position = player:get_pos()
  minetest.log("action", string.format(
    "frame %d %d %.4f %.4f %.3f %.3f %.3f %d %d %d",
    frame,
    minetest.get_us_time(),
    math.deg(camera:get_look_horizontal()),
    math.deg(camera:get_look_vertical()),
    position.x, position.y, position.z,
    pressed_keys(player),
    player:get_wield_index(),
    player:is_in_liquid() and 1 or 0
  ))
end)
